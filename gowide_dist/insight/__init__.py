"""All that looks at recipes, runs and machines without training: plan, status, report, evaluation, doctor."""
