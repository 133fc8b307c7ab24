"""The command `fxzip`: a module per command, and what they share.

`command.py` chooses among the commands and turns errors into exit codes. A recipe (`recipe.py`) names models
(`models.py`, `checkpoints.py`), their data (`sources.py`, `images.py`, `preprocessing.py`) and the options of
`compile_zip` (`options.py`); `preparing.py` makes all of it before anything is computed.
"""
