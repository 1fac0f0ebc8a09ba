INSERT INTO search_words VALUES (1, '''a'':3B ''acme'':1A ''names'':4C ''ner'':2A'::tsvector, '''acme'':1A ''ner'':2A'::tsvector);
