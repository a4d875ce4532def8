"""Judgements as people write them: rows, forms of records, and the data that come of them."""
