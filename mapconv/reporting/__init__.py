"""What people look at: the HTML report, the pictures of a result, and the stored report of ``verify``."""
