"""`mmpipe fit`: a trained head, and the probes of exits inside encoders, from a labelled folder.

request.py     what was asked for, checked first
embedding.py   samples → Embedded: each encoder run once, its embeddings and the asked layers' pooled states kept
splitting.py   labels → training, validation and test parts, by label
training.py    Embedded → Fitted: head, probes, thresholds
measuring.py   what the head is worth on the test part, and what it has to beat
writing.py     → head.safetensors and a config.yaml that runs
page.py        → the report
words.py       → sentences, a few lines for a terminal
run.py         all of it
"""
