"""The forgetting card: what an adapter learned and forgot, and what it was made of.

`facts.py` is the card as data and JSON, `gather.py` reads a run and a base for it, `markdown.py`
and its template make a page of it and write both. Nothing is measured and no weights are loaded
here.
"""
