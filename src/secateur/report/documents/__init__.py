"""What report files hold, command by command."""
