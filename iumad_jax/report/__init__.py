"""The ledger, tables and figures of a run."""
