"""From a network and an image of any size to a result: sliding window and runs over files."""
