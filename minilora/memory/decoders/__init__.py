"""One file a family of decoders: the names of its matrices, how its config.json is read, its block on the ledger.

A file is called like the family's `model_type` and registers itself (`models.register`); it is read when a model of
that family is first asked for. `decoder.py` is what every decoder has, `hugging_face.py` what those of transformers
share, `minilora.py` our own decoder. To add a family, add a file.
"""
