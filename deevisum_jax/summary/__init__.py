"""From segment scores to a summary: shots, knapsack, protocols, the film and the report."""
