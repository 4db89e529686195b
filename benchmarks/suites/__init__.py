"""Which cases the CPU and a GPU measure, and how a case becomes rows."""
