"""How a run goes, whatever is trained: arguments, training, evaluation, resuming, reports."""
