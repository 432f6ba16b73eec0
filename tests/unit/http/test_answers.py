"""What a handler may give back."""

from glamd.http.call import Answer, Raw


def test_what_is_answered_is_not_shown() -> None:
    secret = {"token_data": {"access_token": "shpat_secret"}}
    for shown in (repr(Answer(data=secret)), repr(Raw(body=b"shpat_secret", content_type="x"))):
        assert "shpat_secret" not in shown
        assert "token_data" not in shown
