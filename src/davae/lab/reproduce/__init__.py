"""`davae reproduce`: runs of one of the paper's tables, each done once, and their figures.

`choose` turns a table into jobs, `job` defines them and their hashes, `runs` trains, measures and times them, `tabulate`
makes the table, `figures` the paper's figures from the same runs.
"""
