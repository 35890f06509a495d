"""Scripts that other interpreters run.  They lie apart, because Python looks for imports beside a script first, and would find ours there."""
