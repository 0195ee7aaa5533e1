"""The report: one page, its figures, its ledger."""
