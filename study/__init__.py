"""What to run, and running it: study files, plans, executors, the stage store and the ledger."""
