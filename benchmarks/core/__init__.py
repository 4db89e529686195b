"""What every benchmark is made of: rows, timers, a worker process, Markdown tables, the commit."""
