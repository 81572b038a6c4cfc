"""What keeps a run alive or ends it: heartbeat, watchdog, diagnosis, signals, and the supervisor that launches it again."""
