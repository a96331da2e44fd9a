"""From the ledger's records to statistics, tables, figures and the report."""
