"""The initial adapter as a folder, and the rows of a user's file that `python -m lora_da` makes it from."""
