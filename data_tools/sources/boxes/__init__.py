"""Phrases with boxes, in the forms that annotation tools and data sets have: each read into `annotated.Annotated`, one a picture.

recognise → which form a place is    coco, yolo, labelme, entities, rows → pictures with phrases and boxes
placing   → a box as it stands, in shares of the upright picture    source → items of a store
"""
