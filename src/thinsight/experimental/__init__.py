"""What few need, or is not proven to help yet. Its names are in the front door; nothing else imports from here."""
