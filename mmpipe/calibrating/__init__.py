"""`mmpipe calibrate`: thresholds, and the best order of the modalities, with a promise.

request.py     what was asked for, checked first
scores.py      what every exit would say of each sample, and what it costs; on disk too
shadow.py      samples → Scores: one pass of the full pipeline, then the head alone
certifying.py  Scores → the calibration, and what is to be told of it
page.py        → the report
words.py       → sentences, a few lines for a terminal
run.py         all of it
"""
