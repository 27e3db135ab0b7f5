"What the project costs, beside what others offer, measured in turns in one run: `python -m benchmarks`."
