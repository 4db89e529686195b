"""What test_gpu_parts.py has a worker do; the worker imports it in a process of its own."""

import os
import time


def count_to(number):
    yield from range(number)


def fail_after(number):
    yield from range(number)
    raise ValueError("broken\non purpose")


def die_after(number):
    yield from range(number)
    os.abort()


def sleep_after(number):
    yield from range(number)
    time.sleep(600)


def process_number():
    yield os.getpid()


def compute(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    yield os.getpid()
