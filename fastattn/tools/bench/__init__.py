"""The benchmark: ``runner`` times the rows of ``families``; a row's ``workload`` is what ``peers`` run, too."""
