"""What users need to test their own parts: stand-ins, a fault server, conformance suites."""
