"""``felrec report``: what runs left in their folders, as one page.

::

    runs.py             what is told of: runs and tables, from folders of runs and of suites
    curves.py           what a run told TensorBoard
    statistics.py       a data set in numbers
    cold_start.py       ranks by what came before an event
    representations.py  a map of users and items, the similarities around one interaction
    plots.py            every figure, as SVG; imports matplotlib
    sections.py         the parts of the page, and what cannot be shown
    page.py             all of them as HTML; imports Jinja
"""
