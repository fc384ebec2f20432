"""What few need and nothing proves to help yet. It may change or go.

Nothing outside imports it, but by name: the front door, and the table of searches.
"""
