"""The report of a trained network, and the comparison of several, as one HTML page.

run_data.py gathers what a workdir holds and features.py follows images through the layers; charts.py
and comparison.py draw, on ../plotting.py; one_run.py and several_runs.py say what a page shows,
formatting.py how its numbers are written; page.py fills the templates and writes.
"""
