"""The interactive part of reports: data of the plots, marks of events, the page itself."""
