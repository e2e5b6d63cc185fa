"""report.html: a run on one page. (Drawn from the history.)"""
