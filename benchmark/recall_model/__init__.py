"""Recipe of the embedded recall model: data, constructed start, training, export, evaluation."""
