"""Files in and out; nothing here imports torch or triton before a torch file is opened."""
