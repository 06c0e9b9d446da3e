from django.contrib import admin

from photos.models import Photo, Thumbnail

admin.site.register([Photo, Thumbnail])
