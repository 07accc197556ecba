"""``python -m launch``: the command ``felrec`` from a source tree that is not installed."""

from launch.cli import main

if __name__ == "__main__":
    main()
