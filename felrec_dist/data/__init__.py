"""From raw interactions to histories."""
