"""`ota-merge densities`: all thresholds of a grid from one read.

sample --> expected.py: high halves that thresholds may have
one pass --> counts.py: all high halves; at the expected ones the low halves, by group (groups.py)
search.py settles each threshold that the counts prove; the others take a further pass
densities.py: the table
"""
