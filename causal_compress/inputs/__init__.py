"""What the user brings: a network with its weights (`models.py`) and labelled inputs (`data.py`)."""
