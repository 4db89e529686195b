"""Speed, memory and features of adamae_sampler, measured. README.md says how to run and read each benchmark.

The files at the top are commands. The folders are their parts, and each imports only folders before it:

    core      rows, timers, a worker process, Markdown tables
    ops       one op at one size
    steps     one training step
    suites    the cases of the CPU and of a GPU, and how a case becomes rows
    stages    the processes that gpu.py starts
    masking   masking strategies against each other
    pages     Markdown pages and plots of the rows
    results   the rows and the pages
"""
