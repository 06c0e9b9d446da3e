"""``python -m benchmarks.chaos`` breaks everything around the queue, and then looks
whether its promise held.
"""
