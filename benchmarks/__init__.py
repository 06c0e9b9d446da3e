"""What is measured, and what is tried for hours; never part of the package.

``python -m benchmarks`` measures how fast the queue is, beside what the database itself
allows and beside other queues. ``python -m benchmarks.chaos`` breaks everything around
the queue, and then looks whether its promise held.
"""
