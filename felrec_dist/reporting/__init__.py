"""``felrec report``: what runs left in their folders, as one page.

::

    runs.py             what is told of: runs and tables, from folders of runs and of suites
    curves.py           what a run told TensorBoard
    statistics.py       a data set in numbers
    representations.py  a map of users and items, the similarities around one interaction
    plots.py            every figure, as SVG; imports matplotlib
    page.py             all of it as HTML; imports Jinja
"""
