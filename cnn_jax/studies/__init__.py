"""Many runs: sweeps, reproduction, benchmark."""
