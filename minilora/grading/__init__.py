"""Two processes over a submission: this one knows the references and never runs a student's line, the other runs them
and knows no reference. `models` and `calls` are all that the checkers and the student's process share."""
