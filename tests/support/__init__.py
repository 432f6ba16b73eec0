"""What several tests share: servers, certificates, fakes. No test stands in here."""
