"""`nydusctl explain`: was it lazy, what was fetched, from where, and what did readers wait for?"""
