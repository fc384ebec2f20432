"""What a command runs, from opening the model to the finished report; each stage is kept on disk.

Knows nothing about terminals: what happens is told to a `Watcher`.
"""
