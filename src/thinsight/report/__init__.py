"""What a search, an evaluation or a measurement found, as one HTML file and as pictures.

Knows nothing about how the numbers were made; data.py holds them, and nothing here imports torch.
"""
