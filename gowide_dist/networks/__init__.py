"""Networks: their structure, how they are built, taught and merged. Importing the package imports no torch."""
