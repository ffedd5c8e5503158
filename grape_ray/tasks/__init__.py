"""What is learned: the protocol of a task, the tasks that come with the package, and their
metrics.
"""
