"""Files each mail under its Message-ID, so that sending it again changes nothing.

A mail is outside the database. A process that dies between sending and committing
leaves the mail sent and its job not done; the job runs again and sends once more.
No queue can prevent that. What helps is a name the mail keeps: here the second file
replaces the first; a mail service does the same with an idempotency key.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from django.core.mail import EmailMessage
from django.core.mail.backends import filebased


class EmailBackend(filebased.EmailBackend):
    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        for message in email_messages:
            self.write_once(message)
        return len(email_messages)

    def write_once(self, email_message: EmailMessage) -> None:
        rendered = email_message.message()
        name = rendered["Message-ID"].strip("<>")
        draft = Path(self.file_path) / f"{name}.draft"
        draft.write_bytes(rendered.as_bytes())
        os.replace(draft, draft.with_suffix(".eml"))
