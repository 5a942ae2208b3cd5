"""The report of a trained network, and the comparison of several, as one HTML page.

run_data.py reads a workdir, and features.py records the outputs of layers. charts.py and comparison.py
draw with ../plotting.py. one_run.py and several_runs.py choose the content of a page; formatting.py
formats its numbers. page.py fills the templates and writes the files.
"""
